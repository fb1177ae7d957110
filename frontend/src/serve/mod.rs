//! HTTP: sockets, routes, and a request's way from its body to its answer.

mod answer;
mod body;
mod choice;
mod event_stream;
mod prepare;
mod routes;
mod server;
mod source;

pub use event_stream::Times;
pub use server::run;
