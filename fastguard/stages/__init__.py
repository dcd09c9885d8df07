"""The four stages of a guarded step: measure, reduce, decide, apply.

Modules:
    spike_rules, rule_table    what counts as a spike, and the rules as columns
    limit_rules, adaptive_limits    limits that follow the norms of the run
    agc, units, reference_units    adaptive gradient clipping: one coefficient for each unit
    contract, reason, formulas    what one stage hands to the next, and the formulas they share
    measure, reduce, decide, apply    one stage each, a function of device tensors
    backend         who serves which device: `cpu/`, `triton`, `reference`; `traced` under a tracer
"""
