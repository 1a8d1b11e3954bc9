"""Moving clothes: a data set of short videos that the project draws itself from Fashion-MNIST pictures."""
