"""The four stages of a guarded step: measure, reduce, decide, apply.

Modules:
    spike_rules, rule_table         what counts as a spike; the rules as columns of numbers
    limit_rules, auto_clip, adaptive_limits
                                    limits of the gradient norm that adapt during training
    agc, units, reference_units     adaptive gradient clipping: one coefficient per unit
    grad_stats, contract, reason    the types passed between stages
    formulas                        formulas that stages share
    measure, reduce, decide, apply  one stage each: a function of device tensors
    backend                         selects the implementation for a device: `cpu/`, `triton` or
                                    `reference`; `traced` while tracing
"""
