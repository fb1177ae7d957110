//! The command line of the daemon, made from the table of settings.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};

use crate::config::SETTINGS;

/// Flags of `kvbm daemon`, not yet checked: that happens together with the other sources.
#[derive(Debug, Clone, Default)]
pub struct DaemonArgs {
    /// Settings file; it must exist if named.
    pub config: Option<PathBuf>,
    /// Print the settings and where they came from instead of serving.
    pub print_config: bool,
    values: BTreeMap<&'static str, String>,
}

impl DaemonArgs {
    /// As if `--key value` had been given. Panics if there is no such setting.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        let setting = SETTINGS.iter().find(|setting| setting.key == key);
        let setting = setting.unwrap_or_else(|| panic!("there is no setting {key:?}"));
        self.values.insert(setting.key, value.into());
        self
    }

    pub(crate) fn value(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }
}

impl Args for DaemonArgs {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new("config").long("config").value_name("PATH").value_parser(value_parser!(PathBuf));
        let file = file.help("Settings file [default: kvbm.toml, if there is one] [env: KVBM_CONFIG]");
        let print = Arg::new("print_config").long("print-config").action(ArgAction::SetTrue);
        let print = print.help("Print each setting, its value and where it came from, and exit");
        SETTINGS.iter().fold(command.arg(file).arg(print), |command, setting| {
            let arg = Arg::new(setting.key).long(setting.flag()).help(setting.long_help());
            let arg = arg.action(if setting.is_repeated() { ArgAction::Append } else { ArgAction::Set });
            // A negative number is out of range, not an unknown flag.
            let arg = arg.allow_negative_numbers(true);
            command.arg(if setting.is_switch() {
                arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_name("BOOL")
            } else {
                arg.value_name("VALUE")
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for DaemonArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        if let Some(path) = matches.get_one::<PathBuf>("config") {
            self.config = Some(path.clone());
        }
        self.print_config |= matches.get_flag("print_config");
        for setting in SETTINGS {
            if let Some(given) = matches.get_many::<String>(setting.key) {
                let given: Vec<&str> = given.map(String::as_str).collect();
                self.values.insert(setting.key, given.join(";"));
            }
        }
        Ok(())
    }
}
