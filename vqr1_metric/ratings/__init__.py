"""What people said of images: one reader of every label format, for evaluation and training alike.

Reading order: `sets` (what is known of an image), `files` (a label file becomes a set), `tables` (cells of a file),
`lookup` (names become files), `datasets` (data sets known by name).
"""

from vqr1_metric.ratings.files import read_ratings
from vqr1_metric.ratings.sets import Preference, Problem, RatedImage, RatingError, RatingSet

__all__ = ["Preference", "Problem", "RatedImage", "RatingError", "RatingSet", "read_ratings"]
