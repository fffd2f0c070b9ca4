# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_muon.py
# Not in the paper: Muon on the hidden matrices at AdamW's rate (its updates are scaled to the
# same size), AdamW on the rest. No expected loss is known for these settings.
optimizer = "muon"
batch_size = 15
