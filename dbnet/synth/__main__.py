"""The command `python -m dbnet.synth`."""

from dbnet.errors import run_script
from dbnet.synth.scene import main

if __name__ == "__main__":
    run_script(main)
