"""Find the images that a model was trained on."""

from data.datasets import ImageSet, Split, load_images, split_images
from functions.saved.checkpoint import SavedModel
from functions.support.errors import UserError, printable


def load_and_split(saved: SavedModel, name: str | None = None) -> tuple[ImageSet, Split]:
    """Load and split the data set that a model was trained on, as its saved config says.

    A `name`, or path, replaces the one in the config, for other images or another copy.
    """
    diffusion = saved.config["diffusion"]
    dataset_name = name or diffusion.get("dataset_name")
    if not dataset_name:
        raise UserError(
            "the model's config does not say which images it was trained on; name a data set "
            "with evaluate.py --data NAME"
        )
    # The config of another project's model lacks the fields that have a default here.
    model = saved.model
    try:
        image_set = load_images(
            dataset_name,
            model.image_size,
            diffusion.get("max_bad_images", 0),
            model.channels,
            diffusion.get("labels", False),
        )
    except UserError as error:
        if name:
            raise
        # The model may come from elsewhere, so its images need not be here.
        raise UserError(
            f"this needs the images that {saved.path} was trained on: {str(error).rstrip('.')}; "
            "or name others with evaluate.py --data NAME"
        ) from error
    if image_set.label_names != saved.label_names:
        known = printable(", ".join(saved.label_names))
        raise UserError(f"{dataset_name} has other labels than {saved.path}: {known}")
    return image_set, split_images(image_set, diffusion.get("split", "reference"))
