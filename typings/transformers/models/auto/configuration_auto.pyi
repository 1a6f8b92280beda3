CONFIG_MAPPING_NAMES: dict[str, str]
