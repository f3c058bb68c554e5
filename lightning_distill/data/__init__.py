"""Data: the Shapes world, and captioned pictures from a directory."""

from lightning_distill.data.image_folder import ImageFolder, ImageFolderDataset
from lightning_distill.data.shapes_datamodule import ShapesData, ShapesDataset

__all__ = ["ImageFolder", "ImageFolderDataset", "ShapesData", "ShapesDataset"]
