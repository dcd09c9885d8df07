"""What happened in each step: records, losses, where they go, and how they are read again.

Modules:
    step_record     `StepRecord`
    device_row      a record as one row of numbers on the device, and its way to the host
    recorder        turns rows into records and hands them to sinks and subscribers
    losses, loss_meter    the losses of a step, by name
    json_lines_sink, loggers    where records go: JSON lines, TensorBoard, the log
    line_writer, rotated_files, regular_files, strict_json, read_json_lines    files of records
    subscription    records for those who act on them
    advice          what a run's records suggest, said once
"""
