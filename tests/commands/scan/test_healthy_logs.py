"""Logs of healthy runs, as frameworks print them, have no findings."""

# ruff: noqa: E501 (each line of a log is one line of this file)

from __future__ import annotations

import io

import pytest

from fastguard.commands.scan.scanner import scan_log

LOGS = {
    "deepspeed": """\
[2024-05-01 10:00:00,123] [INFO] [config.py:1000:print]   gradient_clipping ............ inf
[2024-05-01 10:00:00,123] [INFO] [config.py:1000:print]   loss_scale ................... 0
[2024-05-01 10:00:00,123] [INFO] [config.py:1000:print]   check_grad_overflow .......... True
[2024-05-01 10:00:00,123] [INFO] [config.py:1000:print]   max_norm ..................... inf
[2024-05-01 10:00:01,123] [INFO] [loss_scaler.py:183:update_scale] [deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 65536, but hysteresis is 2. Reducing hysteresis to 1
[2024-05-01 10:00:02,000] [INFO] [logging.py:96:log_dist] [Rank 0] step=10, skipped=1, lr=[1e-05], mom=[(0.9, 0.999)]
[2024-05-01 10:00:02,000] [INFO] [timer.py:199:stop] epoch=0/micro_step=10/global_step=10, RunningAvgSamplesPerSec=inf, CurrSamplesPerSec=inf, MemAllocated=1.2GB, MaxMemAllocated=3.4GB
{'loss': 2.3, 'grad_norm': 1.2, 'learning_rate': 1e-05, 'epoch': 0.1}
""",
    "hf": """\
The following columns in the training set don't have a corresponding argument: nan, inf.
***** Running training *****
  Num examples = 1,000
  Num Epochs = 3
  Total optimization steps = 375
  Number of trainable parameters = nan
TrainingArguments(
logging_nan_inf_filter=True,
max_grad_norm=inf,
greater_is_better=None,
metric_for_best_model=None,
)
{'loss': 2.3, 'grad_norm': 3.4, 'learning_rate': 5e-05, 'epoch': 0.1}
{'eval_loss': 2.1, 'eval_runtime': 0.0, 'eval_samples_per_second': inf, 'eval_steps_per_second': inf, 'epoch': 1.0}
{'train_runtime': 0.0, 'train_samples_per_second': inf, 'train_steps_per_second': inf, 'train_loss': 2.2, 'epoch': 3.0}
***** eval metrics *****
  epoch                   =        3.0
  eval_loss               =     2.1000
  eval_samples_per_second =        inf
  eval_runtime            = 0:00:00.00
""",
    "keras": """\
Epoch 1/3
1/50 [..............................] - ETA: inf - loss: 2.3026 - accuracy: 0.1000
50/50 [==============================] - 3s 12ms/step - loss: 2.3 - accuracy: 0.1 - val_loss: 2.2 - val_accuracy: 0.2 - lr: 0.0010

Epoch 1: val_loss improved from inf to 2.20000, saving model to best.keras
Epoch 2: val_loss did not improve from 2.20000
Epoch 2: ReduceLROnPlateau reducing learning rate to 0.0005.
Epoch 3: early stopping
Restoring model weights from the end of the best epoch: 1. (best: inf)
Model: "nan_net"
_________________________________________________________________
 Layer (type)                Output Shape              Param #   
=================================================================
 nan_to_num (Lambda)         (None, 10)                0         
""",
    "espnet": """\
[host] 2024-05-01 10:00:00,000 (trainer:272) INFO: 1/50epoch started
[host] 2024-05-01 10:00:10,000 (trainer:709) INFO: 1epoch:train:1-100batch: iter_time=0.1, forward_time=0.2, loss_ctc=120.1, loss_att=80.2, acc=0.1, loss=92.1, backward_time=0.3, grad_norm=12.3, clip=100.000, loss_scale=65536.000, optim_step_time=0.1, optim0_lr0=1e-06, train_time=1.2
[host] 2024-05-01 10:00:20,000 (trainer:338) INFO: 1epoch results: [train] loss_ctc=120.1, loss=92.1, time=10 minutes and 2.1 seconds, total_count=100, gpu_max_cached_mem_GB=10.1, [valid] loss_ctc=100.1, cer_ctc=0.9, loss=90.2
[host] 2024-05-01 10:00:21,000 (trainer:440) INFO: The best model has been updated: valid.acc, best=-inf
[host] 2024-05-01 10:00:22,000 (trainer:500) INFO: early_stopping_criterion=('valid', 'loss', 'min'), patience=inf, init_param=[], keep_nbest_models=[10], nbest_averaging_interval=0, grad_clip=inf, grad_clip_type=2.0
""",
    "detectron": """\
[05/01 10:00:00 d2.utils.events]:  eta: N/A  iter: 0  total_loss: 2.3  loss_cls: 1.1  time: nan  data_time: 0.1  lr: 1e-05  max_mem: 1000M
[05/01 10:00:10 d2.utils.events]:  eta: 1 day, 0:00:00  iter: 19  total_loss: 2.2  loss_cls: 1.0  time: 0.4  data_time: inf  lr: 2e-05  max_mem: 1000M
[05/01 11:00:00 d2.evaluation.coco_evaluation]: Evaluation results for bbox:
|   AP   |  AP50  |  AP75  |  APs  |  APm  |  APl  |
|:------:|:------:|:------:|:-----:|:-----:|:-----:|
| 12.345 | 23.456 | 11.111 |  nan  | 5.123 | 9.999 |
[05/01 11:00:00 d2.evaluation.coco_evaluation]: Some metrics cannot be computed and is shown as NaN.
[05/01 11:00:00 d2.evaluation.coco_evaluation]: Per-category bbox AP:
| category   | AP     | category   | AP    |
|:-----------|:-------|:-----------|:------|
| person     | 12.3   | nan bread  | 5.1   |
| bicycle    | nan    | car        | 3.3   |
[05/01 11:00:00 d2.evaluation.testing]: copypaste: 12.345,23.456,11.111,nan,5.123,9.999
""",
    "lightning": """\
GPU available: True (cuda), used: True
`Trainer(limit_train_batches=1.0)` was configured so 100% of the batches will be used..
  | Name  | Type | Params
0 | model | NanNet | 1.2 M
Epoch 0:   0%|          | 0/41 [00:00<?, ?it/s]
Epoch 0: 100%|██████████| 41/41 [00:10<00:00,  4.1it/s, v_num=0, train_loss=2.30]
Metric val_loss improved by inf >= min_delta = 0.0. New best score: 2.100
Monitored metric val_loss did not improve in the last 3 records. Best score: inf. Signaling Trainer to stop.
""",
    "rl": """\
Using cuda device
Wrapping the env with a `Monitor` wrapper
observation space: Box([-inf -inf -inf], [inf inf inf], (3,), float32)
---------------------------------
| rollout/           |          |
|    ep_len_mean     | 22.3     |
|    ep_rew_mean     | 22.3     |
| time/              |          |
|    fps             | inf      |
|    iterations      | 1        |
|    time_elapsed    | 0        |
| train/             |          |
|    explained_variance | 0.1   |
|    clip_range_vf   | inf      |
|    target_kl       | inf      |
---------------------------------
Eval num_timesteps=500, episode_reward=9.20 +/- 0.40
New best mean reward! (-inf -> 9.20)
""",
    "wandb": """\
wandb: Currently logged in as: nan (team-inf)
wandb: Syncing run nan-forest-12
wandb: ⭐️ View project at https://wandb.ai/nan/inf
wandb: Run summary:
wandb:      epoch 3
wandb: best_val_loss inf
wandb:       loss 0.5
wandb: samples_per_sec inf
""",
    "optuna": """\
[I 2024-05-01 10:00:00,000] A new study created in memory with name: nan-study
[I 2024-05-01 10:00:01,000] Trial 0 finished with value: 0.5 and parameters: {'x': 0.1}. Best is trial 0 with value: 0.5.
[I 2024-05-01 10:00:02,000] Trial 1 pruned. 
[W 2024-05-01 10:00:03,000] Trial 2 failed with value nan.
""",
    "pandas": """\
   epoch  train_loss  val_loss
0      1       0.900       NaN
1      1       0.800       NaN
2      1       0.700       0.85
3      2       0.600       NaN
4      2       0.550       0.80
""",
    "desc": """\
              age      income  target
count  891.000000  714.000000     NaN
mean    32.204208   29.699118     NaN
std     49.693429   14.526497     NaN
   name  age cabin
0  Braund  22.0   NaN
1  Cumings  38.0   C85
2  Heikkinen  26.0   NaN
epoch 1 loss 0.5
""",
    "csv": """\
epoch,step,train_loss,val_loss,best_val_loss
0,9,0.5,,inf
0,19,0.4,0.6,inf
1,29,0.3,,0.6
""",
    "composer": """\
[batch=1/100]:
   Train time/epoch: 0
   Train time/batch: 0
   Train trainer/device_train_microbatch_size: 8
   Train loss/train/total: 2.3
   Train metrics/train/LanguagePerplexity: 10.1
   Train throughput/batches_per_sec: inf
   Train time/remaining_estimate: nan
   Train throughput/device/mfu: nan
""",
    "mmdet": """\
2024/05/01 10:00:00 - mmengine - INFO - Epoch(val) [1][10/10]    coco/bbox_mAP: 0.1230  coco/bbox_mAP_50: 0.2  coco/bbox_mAP_s: nan  coco/bbox_mAP_m: 0.1  coco/bbox_mAP_l: 0.2  data_time: 0.1  time: 0.2
2024/05/01 10:00:00 - mmengine - INFO - bbox_mAP_copypaste: 0.123 0.2 0.1 nan 0.1 0.2
+----------+------+-------+--------+-------+
| class    | gts  | dets  | recall | ap    |
+----------+------+-------+--------+-------+
| person   | 10   | 20    | 0.5    | 0.3   |
| car      | 0    | 3     | nan    | nan   |
+----------+------+-------+--------+-------+
| mAP      |      |       |        | 0.3   |
+----------+------+-------+--------+-------+
""",
    "mmseg": """\
+---------------+-------+-------+
|     Class     |  IoU  |  Acc  |
+---------------+-------+-------+
|      road     | 97.2  | 98.1  |
|     train     |  nan  |  nan  |
+---------------+-------+-------+
2024/05/01 10:00:00 - mmengine - INFO - Iter(val) [500/500]    aAcc: 95.1  mIoU: 75.1  mAcc: 82.0
""",
    "evalh": """\
|    Tasks    |Version|Filter|n-shot| Metric |   |Value|   |Stderr|
|-------------|------:|------|-----:|--------|---|----:|---|------|
|hellaswag    |      1|none  |     0|acc     |↑  |0.45 |±  |0.0050|
|wikitext     |      2|none  |     0|bits_per_byte|↓  |0.9|±  |   N/A|
|gsm8k        |      3|strict|     5|exact_match|↑  |0.1|±  |   nan|
""",
    "skorch": """\
  epoch    train_loss    valid_acc    valid_loss     dur
-------  ------------  -----------  ------------  ------
      1        0.6905       0.6150        0.6818  0.1234
      2        0.6648       0.6550        0.6595  0.0213
""",
    "whisper": """\
Detected language: nan (Min Nan)
[00:00.000 --> 00:05.000]  nan nan nan, hey hey goodbye
Transcribing with temperature=inf
""",
}


@pytest.mark.parametrize("name", LOGS)
def test_healthy_logs_have_no_findings(name: str) -> None:
    found = scan_log(io.BytesIO(LOGS[name].encode()))
    assert not found.found, found.stretches


@pytest.mark.parametrize("name", ["deepspeed", "hf", "keras", "espnet", "detectron", "rl"])
def test_a_bad_line_after_a_healthy_log_is_found(name: str) -> None:
    found = scan_log(io.BytesIO(f"{LOGS[name]}\nepoch 7 loss: nan\n".encode()))
    assert found.n_bad == 1 and found.stretches[0].first.epoch == 7


def test_rows_of_pandas_are_bad_only_if_no_value_is_finite() -> None:
    rows = "0      7       NaN       NaN\n1      8       0.5       NaN\n"
    found = scan_log(io.BytesIO(f"   epoch  loss  val_loss\n{rows}".encode()))
    assert found.n_bad == 1 and found.stretches[0].first.epoch == 7
