"""Networks beyond torchvision's ResNets: timm's, and several as one."""
