# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_metric_muon.py
# Muon in a diagonal metric on the hidden matrices (beyond the paper), AdamW on the rest, at
# AdamW's rate in the paper. Nothing was measured at this size; results/study.md says what it
# reached at smaller ones.
batch_size = 15
optimizer = "metric_muon"
