"Image restoration built from its parts: each module is exported from a notebook below nbs/."
__version__ = "0.1.0"
