from . import import_utils as import_utils
