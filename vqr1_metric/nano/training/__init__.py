"""The recipe that makes `nano` from a folder of rated pictures: `python -m vqr1_metric.nano.training --help`."""
