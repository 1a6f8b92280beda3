"""Tiles that were found fastest by measurement, and where a call looks them up."""
