//! `/openapi.json`, made of the table of parameters.

use serde_json::{Map, Value, json};

use super::catalog::{Apis, PARAMETERS};
use crate::metrics::Api;

/// The description of all routes.
pub fn openapi() -> Value {
    let get = |summary: &str, tag: &str| json!({ "get": { "summary": summary, "tags": [tag], "responses": { "200": { "description": "As said." } } } });
    let model = json!({ "name": "model", "in": "path", "required": true, "schema": { "type": "string" } });
    let mut one_model = get("One model", "models");
    one_model["get"]["parameters"] = json!([model]);
    json!({
        "openapi": "3.1.0",
        "info": { "title": "kvbm", "version": env!("CARGO_PKG_VERSION") },
        "paths": {
            "/v1/completions": post("Continue a prompt", Api::Completions),
            "/v1/chat/completions": post("Answer a conversation", Api::Chat),
            "/v1/models": get("Models that can be used now", "models"),
            "/v1/models/{model}": one_model,
            "/health": get("Workers and models; 503 without any", "operations"),
            "/live": get("Whether the frontend takes requests", "operations"),
            "/metrics": get("Metrics in the format of Prometheus", "operations"),
            "/openapi.json": get("This description", "operations"),
        },
        "components": { "schemas": {
            "CompletionRequest": request(Api::Completions),
            "ChatCompletionRequest": request(Api::Chat),
            "Error": {
                "type": "object",
                "required": ["error"],
                "properties": { "error": {
                    "type": "object",
                    "required": ["message", "type"],
                    "properties": {
                        "message": { "type": "string" },
                        "type": { "type": "string" },
                        "param": { "type": ["string", "null"] },
                        "code": { "type": ["string", "null"] },
                    },
                } },
            },
        } },
    })
}

fn post(summary: &str, api: Api) -> Value {
    let schema = match api {
        Api::Completions => "#/components/schemas/CompletionRequest",
        Api::Chat => "#/components/schemas/ChatCompletionRequest",
    };
    let error = |description: &str| {
        let schema = json!({ "$ref": "#/components/schemas/Error" });
        json!({ "description": description, "content": { "application/json": { "schema": schema } } })
    };
    let answer = json!({
        "description": "The answer, whole or as events",
        "content": { "application/json": {}, "text/event-stream": {} },
    });
    json!({ "post": {
        "summary": summary,
        "tags": ["inference"],
        "requestBody": { "required": true, "content": { "application/json": { "schema": { "$ref": schema } } } },
        "responses": {
            "200": answer,
            "400": error("The request is wrong; `param` names the parameter"),
            "404": error("There is no such model"),
            "413": error("The body is too large"),
            "502": error("The worker failed while it was answering"),
            "503": error("No worker is free, or there is none"),
            "504": error("The answer took too long"),
        },
    } })
}

fn request(api: Api) -> Value {
    let (prompt, other) = match api {
        Api::Completions => ("prompt", Apis::Chat),
        Api::Chat => ("messages", Apis::Completions),
    };
    let known = PARAMETERS.iter().filter(|parameter| parameter.apis != other);
    let properties = known.map(|parameter| {
        // The table is checked by a test.
        let mut schema: Value = serde_json::from_str(parameter.schema).unwrap_or_default();
        schema["description"] = parameter.about.into();
        (parameter.name.to_owned(), schema)
    });
    json!({ "type": "object", "required": ["model", prompt], "properties": properties.collect::<Map<_, _>>() })
}
