"""What a vision transformer is: its blocks, their tokens, their patch grid."""
