"""`python -m dsdpo` is the same program as `dsdpo`; the launchers start ranks this way."""

from dsdpo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
