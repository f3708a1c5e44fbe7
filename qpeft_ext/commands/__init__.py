"""The commands of ``qpeft``: each module has one function, ``command``."""
