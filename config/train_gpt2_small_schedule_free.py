# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_schedule_free.py
# Schedule-Free AdamW (arXiv:2405.15682), whose rate stays constant after the warm-up, at AdamW's
# rate in the paper. Nothing was measured at this size; results/optimizers_200_steps.md says what it
# reached at smaller ones.
batch_size = 15
optimizer = "schedule_free"
