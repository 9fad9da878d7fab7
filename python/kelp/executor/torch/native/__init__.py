"""Operations of a decoding step in C, compiled where the machine has a compiler; torch does without them."""
