"""3D medical image segmentation with few labels, in TensorFlow and Keras."""

from tfmtseg import compat  # first: it sets up TensorFlow before anything imports it
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.regions import Regions
from tfmtseg.version import __version__

__all__ = ["Regions", "Segmenter", "__version__", "compat"]
