"Image restoration built from its parts. Each module is exported from the notebook of the same name in nbs/."
__version__ = "0.1.0"
