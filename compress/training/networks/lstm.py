"""An LSTM that reads an image row by row.

Source: Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997, with forget gates (Gers, Schmidhuber, Cummins, 2000);
rows as steps: Le, Jaitly, Hinton, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units", 2015.
"""
import torch
from torch import nn


class LSTM(nn.Module):
    """One layer; the four gates are fused into two nn.Linear, so that they compress like any other layer.

    ``g = input(x_t) + recurrent(h)``, cut into i, f, c', o (the order of PyTorch's nn.LSTM);
    ``c = sigmoid(f) c + sigmoid(i) tanh(c')``; ``h = sigmoid(o) tanh(c)``; h and c start at 0.

    ``forward``: x [N, T, inputs] -> the last h [N, hidden].
    """

    def __init__(self, inputs, hidden):
        super().__init__()
        self.hidden = hidden
        self.input, self.recurrent = nn.Linear(inputs, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        for m in (self.input, self.recurrent):
            nn.init.uniform_(m.weight, -hidden ** -0.5, hidden ** -0.5)
        nn.init.zeros_(self.input.bias)
        with torch.no_grad():
            self.input.bias[hidden:2 * hidden] = 1           # remember at first (Jozefowicz et al., ICML 2015)

    def forward(self, x):
        given = self.input(x)
        h = c = given.new_zeros(len(x), self.hidden)
        for step in given.unbind(1):
            i, f, new, o = (step + self.recurrent(h)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(new)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


class LSTMClassifier(nn.Module):
    """``lstm`` over the rows of a one-channel image, then ``linear``; the default fits Fashion-MNIST and MNIST."""

    def __init__(self, *, classes=10, rows=28, columns=28, hidden=128):
        super().__init__()
        self.rows, self.columns, self.input_shape = rows, columns, (1, rows, columns)
        self.lstm, self.linear = LSTM(columns, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.linear(self.lstm(x.reshape(-1, self.rows, self.columns)))
