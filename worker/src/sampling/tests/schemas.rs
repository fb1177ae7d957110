//! Whatever the schema, and whatever the model prefers: the answer is JSON of that schema.

use serde_json::{Map, Value, json};

use super::{Grammar, guides, say, text};

/// Schemas whose answers are checked by another library.
const SCHEMAS: u64 = 500;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn schema(&mut self, depth: u64) -> Value {
        let kinds = if depth == 0 { 7 } else { 10 };
        match self.below(kinds) {
            0 => json!({ "type": "boolean" }),
            1 => json!({ "type": "null" }),
            2 => self.integer(),
            3 => json!({ "type": "number" }),
            4 => self.string(),
            5 => json!({ "enum": ["red", 5, null, { "a": [true] }, "gr\u{fc}n \"x\""] }),
            6 => json!({ "const": format!("v{}", self.below(100)) }),
            7 => self.array(depth),
            8 => json!({ "anyOf": [self.schema(depth - 1), self.schema(depth - 1)] }),
            _ => self.object(depth),
        }
    }

    fn integer(&mut self) -> Value {
        let mut schema = json!({ "type": "integer" });
        if self.one_in(2) {
            let least = self.below(200) as i64 - 100;
            schema["minimum"] = json!(least);
            schema["maximum"] = json!(least + self.below(300) as i64);
        }
        schema
    }

    fn string(&mut self) -> Value {
        match self.below(5) {
            0 => json!({ "type": "string", "minLength": self.below(5), "maxLength": 5 + self.below(10) }),
            1 => json!({ "type": "string", "pattern": "^[a-f]{2,4}-[0-9]+$" }),
            2 => json!({ "type": "string", "format": "date" }),
            3 => json!({ "type": "string", "enum": ["a", "b c", "\u{65e5}"] }),
            _ => json!({ "type": "string" }),
        }
    }

    fn array(&mut self, depth: u64) -> Value {
        let mut schema = json!({ "type": "array", "items": self.schema(depth - 1) });
        if self.one_in(2) {
            let least = self.below(3);
            schema["minItems"] = json!(least);
            schema["maxItems"] = json!(least + self.below(4));
        }
        schema
    }

    fn object(&mut self, depth: u64) -> Value {
        let (mut properties, mut required) = (Map::new(), Vec::new());
        for index in 0..self.below(5) {
            let name = format!("k{index}");
            if self.one_in(2) {
                required.push(name.clone());
            }
            properties.insert(name, self.schema(depth - 1));
        }
        let mut schema = json!({ "type": "object", "properties": properties, "required": required });
        match self.below(3) {
            0 => schema["additionalProperties"] = json!(false),
            1 => schema["additionalProperties"] = json!({ "type": "integer" }),
            _ => {}
        }
        schema
    }
}

#[test]
fn five_hundred_random_schemas_are_kept() {
    let guides = guides();
    // Whatever may end a part is as likely as all else together, so that answers come to an end.
    let mut row = vec![0.0; 4096];
    for (token, logit) in row.iter_mut().enumerate() {
        let text = text(&[token as u32]);
        if text.contains(['"', '}', ']', ',']) {
            *logit = 5.0;
        }
    }
    row[1] = (4096f32).ln();
    for seed in 0..SCHEMAS {
        let mut random = Random(seed);
        let schema = random.schema(3);
        let tokens = say(&guides, &Grammar::JsonSchema(schema.to_string()), seed, &row);
        let answer = text(&tokens);
        let instance: Value = serde_json::from_str(&answer)
            .unwrap_or_else(|error| panic!("seed {seed}: {schema}\n{answer}\n{error}"));
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        assert!(validator.is_valid(&instance), "seed {seed}: {schema}\n{answer}");
    }
}
