"""The networks: quantisers, SPADE, the VQ-GAN of stage 1 and the semantic U-Net of stage 2."""
