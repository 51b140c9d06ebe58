"""How the embedded model is made: from rated pictures to the folder that ships. See `python -m recipes.nano --help`."""
