"""Recommender models whose embedding tables outgrow one device.

Parts, lowest first: a part imports only parts above it in this list.

    ops        one folder per operator: reference, C++ and GPU versions
    jagged     JaggedTensor, KeyedJaggedTensor, KeyedTensor
    optim      update rules as data, optimizers in backward, keyed optimizers
    tables     table configs and embedding collections
    nn         dense blocks
    models     DLRM
    metrics    normalized entropy, calibration, AUC; windowed and lifetime
    data       batches, data sets, preprocessing
    cli        the `shardwise` command
"""
