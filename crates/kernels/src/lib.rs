//! The operations of a decoder, each as a forward that saves and a backward that accumulates.
