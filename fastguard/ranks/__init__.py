"""Joint decisions of several ranks: which ranks decide together, and the weight of each tensor.

    groups       what a user may pass as `group=`
    dtensors     local parts of DTensors, and reduction of partial ones
    span         the ranks that the meshes of tensors span together
    local_group  a process group created by its members only
    plain_shards shards stored in plain tensors, refused without a group
    team         the ranks that decide together, and the weight of each tensor in their sums
    agreement    a single check that all ranks were given the same arguments
    loss_names   a common order for losses that not every rank computes
    lockstep     operations that succeed or fail on all ranks together

The collective itself is `fastguard.stages.reduce`.
"""
