"""Edit images with a trained model: mix two, vary, inpaint or enlarge one.

    python edit.py interpolate A B [RUN]         mixes two images
    python edit.py vary A [RUN]                  samples images similar to one
    python edit.py inpaint A [RUN] --mask FILE   regenerates a part of one
    python edit.py enlarge FILE [MODEL]          doubles the size of a face, by
                                                 a model of ffhq-details

A and B are image files or, except for inpaint, indices of images that the seed
generates. Files are cropped and resized as training images are, to the size of
the model: with --enlarge what they have beyond it is lost, except for inpaint.
RUN comes right after the images; the flags of sampling are those of sample.py.
inpaint has its own sampler. enlarge takes the picture as it is.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import sys
from dataclasses import replace

from functions.sampling.editing import (
    INPAINTING,
    DepthFlags,
    EnlargeFlags,
    InpaintFlags,
    check_edit,
    save_enlarged,
    save_inpaintings,
    save_mixtures,
    save_variations,
)
from functions.sampling.generation import open_pipeline
from functions.sampling.settings import PRETRAINED, default_settings, find_run
from functions.support.command_line import (
    HELP,
    NoFlags,
    read_flags,
    run_script,
    split_words,
)
from functions.support.errors import UserError

# What saves the picture of a verb, its flags, the words before these, and the settings that it has
# whatever a recipe says
VERBS = {
    "interpolate": (save_mixtures, DepthFlags, "A B [RUN]", {}),
    "vary": (save_variations, DepthFlags, "A [RUN]", {}),
    "inpaint": (save_inpaintings, InpaintFlags, "A [RUN]", INPAINTING),
}


def main() -> None:
    """Read the command line, edit the images, and print which file was written."""
    verb, words = read_verb()
    if verb == "enlarge":
        (image, model), words = split_words("FILE [MODEL]", words)
        model = model or str(PRETRAINED.with_name("ffhq-details.safetensors"))
        flags = EnlargeFlags(image=image, model=model)
        save_enlarged(read_flags(flags, words, "enlarge FILE [MODEL]", __doc__))
        return
    save, flags_class, usage, own = VERBS[verb]
    (*images, run), words = split_words(usage, words)
    run = find_run(run, words)
    flags = read_flags(
        flags_class(images=images, run=run, sampling=replace(default_settings(run), **own)),
        words,
        f"{verb} {usage}",
        __doc__,
    )
    check_edit(verb, flags.sampling)
    pipeline = open_pipeline(flags)
    print(f"{verb}: {pipeline}")
    save(flags, pipeline)


def read_verb() -> tuple[str, list[str]]:
    """Split off the first word, which must be a verb; print help if it asks for that."""
    verbs = [*VERBS, "enlarge"]
    verb, *others = sys.argv[1:] or ["--help"]
    if verb in verbs:
        return verb, others
    if verb in HELP:
        read_flags(NoFlags(), [verb], f"{{{','.join(verbs)}}} ...", __doc__)
    raise UserError(f"the first word must be {' or '.join(verbs)}, and is {verb!r}")


if __name__ == "__main__":
    run_script(main)
