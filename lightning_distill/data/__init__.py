"""DataModules: Shapes, captioned images from directories, tar files or the Hub, prompts without images, precomputed data."""

from lightning_distill.data.image_folder import ImageFolder, ImageFolderDataset
from lightning_distill.data.image_text import ImageText, ImageTextDataset
from lightning_distill.data.precomputed import Precomputed, PrecomputedDataset
from lightning_distill.data.prompts import PromptDataset, Prompts
from lightning_distill.data.shapes_datamodule import ShapesData, ShapesDataset

__all__ = [
    "ImageFolder",
    "ImageFolderDataset",
    "ImageText",
    "ImageTextDataset",
    "Precomputed",
    "PrecomputedDataset",
    "PromptDataset",
    "Prompts",
    "ShapesData",
    "ShapesDataset",
]
