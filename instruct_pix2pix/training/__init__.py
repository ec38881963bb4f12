"""What train_instruct_pix2pix.py and finetune_instruct_pix2pix.py share. Start reading at trainer.py."""
