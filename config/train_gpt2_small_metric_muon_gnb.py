# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_metric_muon_gnb.py
# The same as train_gpt2_small_metric_muon.py with Sophia's curvature in the metric, at AdamW's
# rate in the paper. Nothing was measured at this size; results/study.md says what it reached at
# smaller ones.
batch_size = 15
optimizer = "metric_muon_gnb"
