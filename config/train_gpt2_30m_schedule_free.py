# torchrun --nproc_per_node=8 train.py config/train_gpt2_30m_schedule_free.py
# Schedule-Free AdamW (arXiv:2405.15682), whose rate stays constant after the warm-up, at AdamW's
# rate in the paper. Nothing was measured at this size; results/optimizers_200_steps.md says what it
# reached at smaller ones.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "schedule_free"
learning_rate = 1.2e-3
