"""The task: a small model, and points that it can tell apart."""

import torch
from torch import nn


class Net(nn.Module):
    """Two inputs, two classes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


def load_data(partition_id, num_partitions):
    """Points of two clouds; every partition has its own."""
    generator = torch.Generator().manual_seed(partition_id)
    y = torch.arange(120) % 2
    x = torch.randn(120, 2, generator=generator) + 2.0 * (y[:, None] * 2 - 1)
    return (x[:80], y[:80]), (x[80:], y[80:])


def train(net, data, epochs, lr):
    """Plain SGD; returns the mean loss of the last epoch."""
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    for _ in range(epochs):
        losses = []
        for start in range(0, len(y), 16):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x[start : start + 16]), y[start : start + 16])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net, data):
    """Loss and accuracy."""
    x, y = data
    net.eval()
    with torch.no_grad():
        outputs = net(x)
    return nn.functional.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).float().mean().item()
