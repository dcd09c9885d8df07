"""Records of steps and losses: creation, destinations, and reading.

Modules:
    step_record     `StepRecord`
    device_row      a record as one row of numbers on the device, and its transfer to the host
    recorder        turns rows into records and passes them to sinks and subscribers
    losses, loss_meter    the losses of a step, by name
    json_lines_sink, loggers    destinations of records: JSON lines, TensorBoard, loggers
    line_writer, rotated_files, regular_files, strict_json, read_json_lines    files of records
    subscription    inboxes for code that acts on records
    advice          detects problems that show only over many records; warns once
"""
