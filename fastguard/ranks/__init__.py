"""Many ranks, one decision: who decides together, and how much each tensor of a rank counts.

    groups       what a user may pass as `group=`
    dtensors     the local parts of DTensors, and making partial ones whole
    span         the ranks that the meshes of tensors span together
    local_group  a process group that its members make by themselves
    plain_shards shards that look like any other tensor, refused without a group
    team         the ranks that take one decision, and the weight of each tensor in their sums
    agreement    whether all ranks were given the same arguments, asked once
    loss_names   losses that not every rank gives, in the same places on all
    watch        on which rank a bad gradient was born

The collective itself is `fastguard.stages.reduce`.
"""
