//! Nothing: the tests of this crate compare the reference engine with candle, another implementation of the same models.
#![forbid(unsafe_code)]
