"""The recipe that makes `nano` from a folder of rated pictures: `python -m recipes.nano --help`."""
