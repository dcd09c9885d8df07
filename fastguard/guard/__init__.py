"""`GuardedOptimizer`: wraps a torch optimizer and skips, clips or cleans bad steps.

Modules:
    guarded                   the optimizer; a step is measure, reduce, decide, apply
    arguments, clip_scope, rank_arguments
                              checks of arguments; layout of segments; agreement between ranks
    wrapper, reporting        the interface of `torch.optim.Optimizer`; records and counters
    param_groups, param_gradients
                              adding parameters; the gradients of the parameters
    stepper                   the ways to skip a step: `on_device`, `in_update`, `read_first`,
                              `whole_step`
    flat_parameters, flat_blocks, flat_step, flat_checks
                              `flat_parameters=True`: parameters and state in one buffer
    compiled_step, compiled_state, masked_update, placeholder_optimizer, tensor_settings
                              `compile_step=True`: a compiled update with masked writes
    inner_step, step_hooks, step_in_flight
                              calls of the wrapped optimizer; undoing a step after an exception
    grad_scaler, found_inf    loss scaling
    saving, state_dict/       saving and loading
    unit_clipping, clamp      `AGC` and `clip_value` within a step
    model_buffers, buffer_places
                              restoring batch statistics after a skipped step
    watch/                    further quantities: norms per tensor, drift of replicas, ...
    rank_watch                the rank on which a bad gradient originated
"""
