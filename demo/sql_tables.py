"""The tables that the demo's questions are about, with the words people use for their columns.

`TRAIN` and `HELDOUT` share no table, so a held-out question is always about a schema that training
never showed. `make_data.py` turns these descriptions into questions and SQL.
"""

from __future__ import annotations

from dataclasses import dataclass

Span = tuple[int, int, int]
"""Lowest value, highest value and step of the numbers that a question may name."""


@dataclass(frozen=True)
class Text:
    """A VARCHAR column. `modifier` follows the table's noun, as in "singers | from {}"."""

    name: str
    modifier: str
    values: str
    """Values that a question may name, separated by "|"."""

    @property
    def words(self) -> str:
        """What a question calls the column."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Number:
    """An INTEGER column. `over` and `under` follow the table's noun, as in "singers | older than {}"."""

    name: str
    over: str
    under: str
    span: Span
    top: str = ""
    """Superlative for the row with the largest value ("oldest"); empty: none."""
    bottom: str = ""
    """Superlative for the row with the smallest value ("youngest"); empty: none."""

    @property
    def words(self) -> str:
        """What a question calls the column."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """One table: its nouns, the column that names a row, and the other columns."""

    name: str
    one: str
    many: str
    label: Text
    columns: tuple[Text | Number, ...]
    parent: str = ""
    """Name of the table that `<parent>_id` points to; empty: none."""
    link: str = ""
    """Joins the nouns of child and parent, as in "books | by | authors from Chile"."""


def table(
    name: str, one: str, many: str, label: Text, *columns: Text | Number, parent: str = "", link: str = ""
) -> Table:
    """A `Table` with its columns one after the other."""
    return Table(name, one, many, label, columns, parent, link)


def count(name: str, things: str, span: Span, top: str = "", bottom: str = "") -> Number:
    """A column that counts things: "books with more than 300 pages"."""
    return Number(name, f"with more than {{}} {things}", f"with fewer than {{}} {things}", span, top, bottom)


def level(name: str, span: Span, top: str = "", bottom: str = "") -> Number:
    """A column with a plain amount: "rooms with a nightly rate above 120"."""
    words = f"{'an' if name[0] in 'aeiou' else 'a'} {name.replace('_', ' ')}"
    return Number(name, f"with {words} above {{}}", f"with {words} below {{}}", span, top, bottom)


def year(name: str, verb: str, span: Span, top: str = "", bottom: str = "") -> Number:
    """A column with a year: "movies released after 1995"."""
    return Number(name, f"{verb} after {{}}", f"{verb} before {{}}", span, top, bottom)


TRAIN = (
    table(
        "author",
        "author",
        "authors",
        Text("name", "named {}", "Nora Lind|Tomas Reyes|Aiko Mori|Peter Hale|Lucia Conti"),
        Text("country", "from {}", "Chile|Norway|Japan|Italy|Ghana"),
        year("birth_year", "born", (1900, 1995, 5)),
        count("award_count", "awards", (2, 12, 1)),
    ),
    table(
        "book",
        "book",
        "books",
        Text("title", "titled {}", "Silent Harbor|The Glass Road|Winter Maps|Red Lanterns|Salt"),
        Text("genre", "in the {} genre", "Poetry|Crime|History|Fantasy|Travel"),
        count("page_count", "pages", (120, 800, 20), "longest", "shortest"),
        Number(
            "price",
            "costing more than {} dollars",
            "costing less than {} dollars",
            (8, 60, 2),
            "most expensive",
            "cheapest",
        ),
        parent="author",
        link="by",
    ),
    table(
        "doctor",
        "doctor",
        "doctors",
        Text("doctor_name", "named {}", "Dr. Osei|Dr. Klein|Dr. Varga|Dr. Singh|Dr. Moreau"),
        Text("specialty", "specialized in {}", "Cardiology|Dermatology|Neurology|Pediatrics"),
        Number(
            "years_of_service", "with more than {} years of service", "with less than {} years of service", (3, 30, 1)
        ),
    ),
    table(
        "appointment",
        "appointment",
        "appointments",
        Text("patient", "of the patient {}", "Ivan Petrov|Mary Boyd|Chen Wei|Rosa Diaz|Omar Aziz"),
        Text("room", "in room {}", "A1|A2|B3|C4"),
        Number("duration", "longer than {} minutes", "shorter than {} minutes", (10, 90, 5), "longest", "shortest"),
        level("fee", (40, 300, 10)),
        parent="doctor",
        link="with",
    ),
    table(
        "team",
        "team",
        "teams",
        Text("team_name", "called {}", "Harbor Wolves|Red Comets|Stone Lions|River Kings"),
        Text("city", "based in {}", "Leeds|Porto|Malmo|Quito|Osaka"),
        year("founding_year", "founded", (1890, 2010, 10), "newest", "oldest"),
        count("title_count", "titles won", (1, 20, 1), "most successful"),
    ),
    table(
        "player",
        "player",
        "players",
        Text("player_name", "named {}", "Jonas Berg|Luis Prado|Kofi Mensah|Ryo Tanaka|Adam Fox"),
        Text("position", "in the position {}", "Goalkeeper|Defender|Midfielder|Striker"),
        count("goal_count", "goals", (2, 40, 1)),
        Number("height", "taller than {} cm", "shorter than {} cm", (165, 205, 5), "tallest", "shortest"),
        parent="team",
        link="of",
    ),
    table(
        "airline",
        "airline",
        "airlines",
        Text("airline_name", "called {}", "Skyward|Polar Air|BlueJet|Sunwing|Nordfly"),
        Text("home_country", "from {}", "Canada|Spain|Iceland|Turkey|India"),
        Number(
            "fleet_size",
            "with a fleet of more than {} planes",
            "with a fleet of fewer than {} planes",
            (20, 400, 20),
            "largest",
            "smallest",
        ),
    ),
    table(
        "flight",
        "flight",
        "flights",
        Text("flight_number", "with the flight number {}", "SK210|PA77|BJ502|SW19|NF340"),
        Text("origin", "leaving from {}", "Oslo|Madrid|Toronto|Delhi|Ankara"),
        Text("destination", "going to {}", "Rome|Dublin|Cairo|Lima|Seoul"),
        Number("distance", "longer than {} miles", "shorter than {} miles", (200, 6000, 100), "longest", "shortest"),
        level("ticket_price", (60, 900, 20), "most expensive", "cheapest"),
        parent="airline",
        link="of",
    ),
    table(
        "customer",
        "customer",
        "customers",
        Text("customer_name", "named {}", "Hanna Weiss|Paul Grant|Sofia Rossi|Raj Patel"),
        Text("state", "living in {}", "Texas|Ohio|Nevada|Maine|Oregon"),
        Number("age", "older than {}", "younger than {}", (18, 75, 1), "oldest", "youngest"),
    ),
    table(
        "orders",
        "order",
        "orders",
        Text("order_code", "with the order code {}", "X1001|X1002|X2040|X3055|X4100"),
        Text("status", "with the status {}", "shipped|pending|returned|cancelled"),
        Number(
            "total",
            "with a total above {} dollars",
            "with a total below {} dollars",
            (20, 900, 10),
            "most expensive",
            "cheapest",
        ),
        count("item_count", "items", (2, 20, 1)),
        parent="customer",
        link="from",
    ),
    table(
        "museum",
        "museum",
        "museums",
        Text("museum_name", "called {}", "North Gallery|Plaza Museum|The Mill|City Arts"),
        Text("town", "located in {}", "Bergen|Seville|Ghent|Graz|Nantes"),
        count("visitor_count", "visitors", (1000, 90000, 1000)),
        year("opening_year", "opened", (1850, 2015, 5), "newest", "oldest"),
    ),
    table(
        "painting",
        "painting",
        "paintings",
        Text("title", "titled {}", "Blue Orchard|The Ferry|Old Square|Storm at Noon|Two Sisters"),
        Text("style", "in the {} style", "Baroque|Cubist|Modern|Gothic|Realist"),
        year("year_painted", "painted", (1600, 1990, 10), "newest", "oldest"),
        Number(
            "value", "worth more than {} dollars", "worth less than {} dollars", (5000, 900000, 5000), "most valuable"
        ),
        parent="museum",
        link="in",
    ),
    table(
        "department",
        "department",
        "departments",
        Text("department_name", "called {}", "Sales|Research|Legal|Support|Finance"),
        Text("building", "in the building {}", "East Wing|West Wing|Tower|Annex"),
        level("budget", (10000, 900000, 10000)),
    ),
    table(
        "employee",
        "employee",
        "employees",
        Text("name", "named {}", "Greta Holm|Diego Luna|Emma Stone|Bao Tran|Yara Haddad"),
        Text("job", "working as {}", "Analyst|Engineer|Manager|Clerk|Designer"),
        Number("salary", "earning more than {}", "earning less than {}", (30000, 120000, 1000), "best paid"),
        Number("age", "older than {}", "younger than {}", (21, 64, 1), "oldest", "youngest"),
        parent="department",
        link="in",
    ),
    table(
        "hotel",
        "hotel",
        "hotels",
        Text("hotel_name", "called {}", "Grand Palm|Sea View|Old Mill Inn|The Crown"),
        Text("location", "in {}", "Nice|Athens|Phuket|Miami|Zurich"),
        level("star_rating", (2, 4, 1)),
        year("year_built", "built", (1900, 2015, 5), "newest", "oldest"),
    ),
    table(
        "hotel_room",
        "hotel room",
        "hotel rooms",
        Text("room_number", "with the room number {}", "101|102|204|305|410"),
        Text("bed_type", "with a {} bed", "King|Queen|Twin|Single"),
        level("nightly_rate", (50, 500, 10), "most expensive", "cheapest"),
        Number("guest_limit", "for more than {} guests", "for fewer than {} guests", (2, 6, 1)),
        parent="hotel",
        link="of",
    ),
    table(
        "artist",
        "artist",
        "artists",
        Text("artist_name", "named {}", "Mina Sol|The Drifters|Aldo Ferri|Nightbird"),
        Text("country", "from {}", "Brazil|France|Kenya|Korea|Ireland"),
        year("debut_year", "with a debut", (1965, 2020, 5)),
    ),
    table(
        "song",
        "song",
        "songs",
        Text("song_title", "titled {}", "Paper Moon|Gravity|Slow Train|Hello Again|Ember"),
        Text("language", "sung in {}", "English|French|Swahili|Korean"),
        Number("duration", "longer than {} seconds", "shorter than {} seconds", (120, 400, 10), "longest", "shortest"),
        Number(
            "play_count",
            "played more than {} times",
            "played fewer than {} times",
            (1000, 90000, 1000),
            "most played",
            "least played",
        ),
        parent="artist",
        link="by",
    ),
    table(
        "school",
        "school",
        "schools",
        Text("school_name", "called {}", "Hillside High|Lakeview|Saint Mary|Oakwood"),
        Text("district", "in the district {}", "North|South|Central|Harbor"),
        count("teacher_count", "teachers", (10, 90, 5)),
    ),
    table(
        "student",
        "student",
        "students",
        Text("name", "named {}", "Lily Park|Ben Cole|Ana Souza|Karim Said|Eva Novak"),
        Text("major", "studying {}", "Biology|Physics|Music|Law|Economics"),
        Number("credit_points", "with more than {} credit points", "with fewer than {} credit points", (20, 40, 1)),
        Number("age", "older than {}", "younger than {}", (15, 25, 1), "oldest", "youngest"),
        parent="school",
        link="at",
    ),
    table(
        "car",
        "car",
        "cars",
        Text("model", "of the model {}", "Falcon|Zephyr|Terra|Nova|Comet"),
        Text("maker", "made by {}", "Volta|Kaido|Auriga|Brandt"),
        Text("color", "painted {}", "red|black|silver|white|blue"),
        Number(
            "horsepower", "with more than {} horsepower", "with less than {} horsepower", (70, 400, 10), "most powerful"
        ),
        level("mileage", (5000, 150000, 5000)),
    ),
    table(
        "movie",
        "movie",
        "movies",
        Text("title", "titled {}", "Night Ferry|Dust|The Long Game|Echo Park|Last Snow"),
        Text("director", "directed by {}", "Ana Ruiz|Lars Holt|Mei Lin|Joe Banks"),
        Text("genre", "in the {} genre", "Drama|Comedy|Horror|Action"),
        year("release_year", "released", (1970, 2020, 5), "newest", "oldest"),
        level("gross_income", (1000, 90000, 1000)),
    ),
    table(
        "city",
        "city",
        "cities",
        Text("city_name", "called {}", "Bergamo|Arequipa|Tampere|Mombasa|Hobart"),
        Text("region", "in the region {}", "Lombardy|Andes|Coast|Tasmania"),
        level("population", (20000, 900000, 10000), "largest", "smallest"),
        level("area", (10, 600, 10)),
    ),
    table(
        "restaurant",
        "restaurant",
        "restaurants",
        Text("name", "called {}", "Casa Verde|Noodle Bar|The Anchor|Bella Roma|Spice Hut"),
        Text("cuisine", "serving {} food", "Mexican|Thai|Italian|Indian|Greek"),
        Text("street", "on {}", "Main Street|Oak Avenue|Mill Lane|Dock Road"),
        level("rating", (2, 9, 1), "best rated", "worst rated"),
        count("seat_count", "seats", (20, 120, 5), "largest", "smallest"),
    ),
    table(
        "product",
        "product",
        "products",
        Text("product_name", "called {}", "Desk Lamp|Wool Scarf|Tea Kettle|Steel Pan"),
        Text("category", "in the category {}", "Kitchen|Garden|Office|Clothing|Toys"),
        Text("brand", "of the brand {}", "Luma|Hearth|Fjord|Acorn"),
        Number(
            "price",
            "costing more than {} dollars",
            "costing less than {} dollars",
            (5, 150, 5),
            "most expensive",
            "cheapest",
        ),
        level("stock", (5, 400, 5)),
    ),
    table(
        "recipe",
        "recipe",
        "recipes",
        Text("dish", "for the dish {}", "Lentil Soup|Apple Pie|Fish Curry|Ratatouille|Ramen"),
        Text("course", "for the course {}", "Starter|Main|Dessert|Snack"),
        count("calorie_count", "calories", (100, 900, 20)),
        Number("cooking_time", "taking more than {} minutes", "taking less than {} minutes", (10, 120, 5)),
    ),
    table(
        "apartment",
        "apartment",
        "apartments",
        Text("address", "at the address {}", "12 Elm St|9 Bay Rd|40 Hill Ave|3 Park Ln"),
        Text("neighborhood", "in the neighborhood {}", "Old Town|Riverside|Midtown|Docklands"),
        level("rent", (500, 4000, 100), "most expensive", "cheapest"),
        count("bedroom_count", "bedrooms", (2, 5, 1)),
    ),
    table(
        "satellite",
        "satellite",
        "satellites",
        Text("name", "named {}", "Vega 1|Orbit Eye|Terra Sat|Helio 4|Luna Link"),
        Text("operator", "operated by {}", "ESA|NASA|ISRO|JAXA"),
        year("launch_year", "launched", (1975, 2022, 1), "newest", "oldest"),
        Number("mass", "heavier than {} kg", "lighter than {} kg", (100, 6000, 100), "heaviest", "lightest"),
    ),
    table(
        "dog",
        "dog",
        "dogs",
        Text("name", "named {}", "Biscuit|Rex|Luna|Shadow|Pepper"),
        Text("breed", "of the breed {}", "Beagle|Collie|Husky|Poodle"),
        Text("owner", "owned by {}", "Mrs. Hart|Mr. Ito|Ms. Boyle|Mr. Costa"),
        Number("weight", "heavier than {} kg", "lighter than {} kg", (4, 50, 2), "heaviest", "lightest"),
        Number("age", "older than {}", "younger than {}", (1, 14, 1), "oldest", "youngest"),
    ),
    table(
        "bridge",
        "bridge",
        "bridges",
        Text("bridge_name", "called {}", "Kings Bridge|Iron Span|Delta Crossing|Old Arch"),
        Text("river", "over the river {}", "Danube|Tagus|Elbe|Volga"),
        Number("length", "longer than {} meters", "shorter than {} meters", (50, 2000, 50), "longest", "shortest"),
        year("year_built", "built", (1800, 2010, 10), "newest", "oldest"),
    ),
    table(
        "festival",
        "festival",
        "festivals",
        Text("festival_name", "called {}", "Harvest Days|Jazz Week|Lantern Night|Film Fair"),
        Text("month", "held in {}", "May|June|August|October"),
        Text("host_city", "hosted by {}", "Turin|Basel|Cork|Lyon"),
        level("attendance", (500, 50000, 500)),
        Number(
            "day_count", "lasting more than {} days", "lasting fewer than {} days", (2, 14, 1), "longest", "shortest"
        ),
    ),
    table(
        "college_course",
        "college course",
        "college courses",
        Text("course_name", "called {}", "Algebra|World History|Chemistry|Pottery|Statistics"),
        Text("semester", "in the {} semester", "Spring|Summer|Fall|Winter"),
        Text("instructor", "taught by {}", "Prof. Adler|Prof. Okoye|Prof. Nash|Prof. Silva"),
        count("credit_count", "credits", (2, 8, 1)),
        level("enrollment", (10, 300, 10)),
    ),
    table(
        "laptop",
        "laptop",
        "laptops",
        Text("model", "of the model {}", "AirLite 3|ProBook X|Swift 14|Nimbus|Atlas 15"),
        Text("brand", "of the brand {}", "Orion|Techna|Lumen|Apex"),
        Number("memory", "with more than {} GB of memory", "with less than {} GB of memory", (8, 64, 8)),
        Number("weight", "heavier than {} grams", "lighter than {} grams", (900, 3000, 100), "heaviest", "lightest"),
        Number(
            "price",
            "costing more than {} dollars",
            "costing less than {} dollars",
            (400, 3000, 100),
            "most expensive",
            "cheapest",
        ),
    ),
    table(
        "car_race",
        "car race",
        "car races",
        Text("race_name", "called {}", "Dune Rally|Coast Cup|Alpine Dash|City Sprint"),
        Text("winner", "won by {}", "Kai Moller|Tess Ward|Ugo Bassi|Nia Grey"),
        Text("surface", "run on {}", "gravel|asphalt|sand|snow"),
        count("lap_count", "laps", (5, 80, 5)),
        Number("prize_money", "with prize money above {}", "with prize money below {}", (1000, 90000, 1000)),
    ),
)

HELDOUT = (
    table(
        "port",
        "port",
        "ports",
        Text("port_name", "called {}", "Rotterdam|Callao|Busan|Durban"),
        Text("country", "in {}", "Peru|Netherlands|Egypt|Vietnam"),
        count("dock_count", "docks", (4, 60, 2)),
    ),
    table(
        "ship",
        "ship",
        "ships",
        Text("ship_name", "called {}", "Sea Otter|Northern Star|Marlin|Coral Queen"),
        Text("flag", "under the flag of {}", "Panama|Liberia|Malta|Greece"),
        level("tonnage", (2000, 80000, 1000)),
        Number("crew_size", "with a crew of more than {}", "with a crew of fewer than {}", (8, 40, 2)),
        parent="port",
        link="from",
    ),
    table(
        "trainer",
        "trainer",
        "trainers",
        Text("trainer_name", "named {}", "Olga Ivers|Marco Bell|Tina Zhou|Sam Adeyemi"),
        Text("level", "at the level {}", "junior|senior|expert"),
        Number("hourly_pay", "with an hourly pay above {}", "with an hourly pay below {}", (15, 80, 5), "best paid"),
    ),
    table(
        "fitness_class",
        "fitness class",
        "fitness classes",
        Text("class_name", "called {}", "Morning Yoga|Spin Basics|Core Burn|Aqua Fit"),
        Text("weekday", "held on {}", "Monday|Tuesday|Friday|Saturday"),
        Number("duration", "longer than {} minutes", "shorter than {} minutes", (20, 90, 5), "longest", "shortest"),
        count("spot_count", "spots", (6, 40, 2)),
        parent="trainer",
        link="of",
    ),
    table(
        "studio",
        "studio",
        "studios",
        Text("studio_name", "called {}", "Pixel Forge|Moonlit|Bright Owl|Ironleaf"),
        Text("home_city", "based in {}", "Kyoto|Austin|Warsaw|Montreal"),
        Number(
            "staff_size",
            "with a staff of more than {}",
            "with a staff of fewer than {}",
            (10, 500, 10),
            "largest",
            "smallest",
        ),
    ),
    table(
        "video_game",
        "video game",
        "video games",
        Text("game_title", "titled {}", "Star Drift|Castle Nine|Mud Racers|Quiet Woods"),
        Text("platform", "for the platform {}", "PC|Console|Mobile|Arcade"),
        level("review_score", (40, 95, 5), "best reviewed", "worst reviewed"),
        Number("unit_sales", "with more than {} unit sales", "with fewer than {} unit sales", (10000, 900000, 10000)),
        parent="studio",
        link="by",
    ),
    table(
        "mountain",
        "mountain",
        "mountains",
        Text("mountain_name", "called {}", "Grey Peak|Mount Ardan|Kestrel Top|Twin Horn"),
        Text("mountain_range", "in the mountain range {}", "Alps|Rockies|Atlas|Carpathians"),
        Number("elevation", "higher than {} meters", "lower than {} meters", (1500, 8000, 100), "highest", "lowest"),
        year("first_climb_year", "first climbed", (1800, 1970, 10)),
    ),
    table(
        "wine",
        "wine",
        "wines",
        Text("wine_name", "called {}", "Casa Alta|Vieux Clos|Monte Rosso|Silver Creek"),
        Text("grape", "made from the grape {}", "Merlot|Riesling|Malbec|Syrah"),
        year("vintage", "with a vintage", (1990, 2020, 1)),
        level("bottle_price", (10, 200, 5), "most expensive", "cheapest"),
    ),
    table(
        "train",
        "train",
        "trains",
        Text("train_code", "with the train code {}", "IC204|RE18|TGX7|NT55"),
        Text("start_station", "starting at {}", "Utrecht|Lviv|Nagoya|Bologna"),
        Number("top_speed", "faster than {} km/h", "slower than {} km/h", (80, 320, 20), "fastest", "slowest"),
        count("coach_count", "coaches", (3, 16, 1)),
    ),
    table(
        "insurance_claim",
        "insurance claim",
        "insurance claims",
        Text("claimant", "by the claimant {}", "Ruth Abel|Hugo Stein|Priya Nair|Leo Marsh"),
        Text("reason", "with the reason {}", "fire|theft|flood|hail"),
        Number(
            "amount", "over an amount above {}", "over an amount below {}", (500, 20000, 500), "largest", "smallest"
        ),
        Number("processing_time", "open for more than {} days", "open for fewer than {} days", (5, 120, 5)),
    ),
    table(
        "theater_play",
        "theater play",
        "theater plays",
        Text("play_title", "titled {}", "The Mask|Broken Clock|Seven Doors|Marigold"),
        Text("writer", "written by {}", "Ida Frost|Noel Tremblay|Zane Obi|Clara Voss"),
        count("act_count", "acts", (2, 6, 1)),
        year("premiere_year", "with a premiere", (1900, 2015, 5), "newest", "oldest"),
    ),
    table(
        "volunteer",
        "volunteer",
        "volunteers",
        Text("volunteer_name", "named {}", "Bea Lund|Carl Ochoa|Dina Farouk|Ed Quinn"),
        Text("task", "doing the task {}", "cooking|driving|tutoring|cleaning"),
        count("hours_worked", "hours", (5, 120, 5)),
        year("joining_year", "joining", (2005, 2023, 1)),
    ),
)
