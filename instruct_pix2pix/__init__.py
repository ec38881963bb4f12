"""What train_instruct_pix2pix.py and finetune_instruct_pix2pix.py share. Start reading at trainer.py."""

import os

# The libraries read these when they are imported. Their chatter would bury this project's own messages.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
