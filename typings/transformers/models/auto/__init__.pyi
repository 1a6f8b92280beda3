from . import configuration_auto as configuration_auto
