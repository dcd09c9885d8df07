"""`GuardedOptimizer`: a torch optimizer that measures, decides, and steps or not.

Modules:
    guarded         the optimizer; one step is four lines
    arguments, clip_scope, rank_arguments    what it is given
    wrapper, reporting    being an optimizer, and saying what happened
    param_gradients the gradients of its parameters
    stepper         one road for each way to skip: `on_device`, `read_first`, `whole_step`
    flat_parameters, flat_step, flat_checks    parameters and state in one buffer, one update
    compiled_step, compiled_state, masked_update, tensor_settings    an update with masked writes
    inner_step, step_hooks, step_in_flight    a step that an exception takes back
    grad_scaler, found_inf    loss scaling
    state_dict/     saving and loading
    unit_clipping   adaptive gradient clipping in a step
    model_buffers, buffer_places    batch statistics that a skipped step takes back
    watch/          what else a step can tell: tensor norms, drift of replicas, ...
    rank_watch      which rank had the bad batch
"""
