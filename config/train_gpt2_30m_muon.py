# torchrun --nproc_per_node=8 train.py config/train_gpt2_30m_muon.py
# Not in the paper: Muon on the hidden matrices at AdamW's rate (its updates are scaled to the
# same size), AdamW on the rest. No expected loss is known for these settings.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "muon"
learning_rate = 1.2e-3
