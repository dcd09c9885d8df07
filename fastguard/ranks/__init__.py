"""Joint decisions of several ranks: which ranks decide together, and the weight of each tensor.

    groups       the values that a user may pass as `group=`
    dtensors     local parts of DTensors, and reduction of partial ones
    span         the ranks that are connected by the meshes of tensors
    local_group  a process group created by its members only
    plain_shards shards stored in plain tensors, which need a group
    team         the ranks that decide together, and the weight of each tensor in their sums
    agreement    a one-time check that all ranks were given the same arguments
    loss_names   a common order for losses that not every rank computes
    lockstep     operations that succeed or fail on all ranks together

The collective itself is `fastguard.stages.reduce`.
"""
