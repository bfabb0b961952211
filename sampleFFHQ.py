"""Sample faces from the newest FFHQ run: write a grid of 20 and its animation.

Without such a run, it uses the model of people in pretrained/. The script has
the flags of sample.py. To train a run, put FFHQ at data/FFHQ and start `python
train.py ffhq-64`, or on a GPU `python train.py ffhq-day`.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import sample
from functions.support.command_line import run_script


def main() -> None:
    sample.main("ffhq", __doc__, n=20, gif=True)


if __name__ == "__main__":
    run_script(main)
