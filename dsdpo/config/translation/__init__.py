"""Options of other trainers, put into the words of this one: a table for each trainer, and what reads them."""
