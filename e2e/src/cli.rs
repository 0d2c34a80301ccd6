//! The command line: reads arguments, sets up what all commands need, calls one of them.

mod demo;
mod test;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use e2e::context::{self, Ctx, DataCentre};
use e2e::paths::Paths;
use e2e::{
    cache, deploy, exec, fuzz, interrupt, lint, logs, machine, mutants, oci_runtime, progress,
    runner,
    scenarios::{self, Needs},
    tools,
};

/// The emulated data centre of vf-provisioner, its demonstration and its tests.
#[derive(Parser)]
#[command(name = "cargo e2e", version)]
struct Args {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the programs the data centre is made of
    Tools,
    /// Set up the data centre and leave it running
    Up,
    /// End the data centre; only caches stay
    Down,
    /// Show what of the data centre runs
    Status,
    /// Set up the data centre and show one claim's way up and back
    Demo {
        /// Leave all running and print how to reach both clusters
        #[arg(long)]
        keep: bool,
    },
    /// Run all tests, or the scenarios whose name contains one of the words
    Test {
        /// Words of scenario names
        names: Vec<String>,
        /// Without names: leave out the scenarios on the emulated machines
        #[arg(long)]
        no_machines: bool,
        /// Without names: the scenarios too that take minutes
        #[arg(long)]
        long: bool,
        /// Leave a data centre that this run set up running
        #[arg(long)]
        keep: bool,
        /// List the scenarios and end
        #[arg(long)]
        list: bool,
    },
    /// Compile the programs and put what changed into the running data centre
    Deploy,
    /// Start the machines of the running data centre
    Machine,
    /// Run a shell command in a machine: `l1`, or the name of a VM
    Run {
        machine: String,
        command: String,
        /// Longest it may take, in seconds
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Play the switch on the managed PF's wire (started by the harness)
    #[command(hide = true)]
    Switch(machine::SwitchArgs),
    /// Hand /dev/kvm to pods (started by the harness, in L1)
    #[command(hide = true)]
    DevicePlugin(machine::DevicePluginArgs),
    /// Collect the logs of every part of the running data centre
    Logs,
    /// Check licences, bans and sources of the dependencies against deny.toml
    Lint,
    /// Break the code on purpose and expect the tests to go red
    Mutants {
        /// Words of patch names
        names: Vec<String>,
    },
    /// Run the fuzzers of what is read from outside, from the kept inputs
    Fuzz {
        /// Targets, as in fuzz/corpus; all if none
        targets: Vec<String>,
        /// How long each target runs
        #[arg(long, default_value_t = 1.0)]
        minutes: f64,
        /// Add a few inputs that reach something new to fuzz/corpus
        #[arg(long)]
        keep: bool,
    },
}

impl Verb {
    fn name(&self) -> &'static str {
        match self {
            Self::Tools => "tools",
            Self::Up => "up",
            Self::Down => "down",
            Self::Status => "status",
            Self::Demo { .. } => "demo",
            Self::Test { .. } => "test",
            Self::Deploy => "deploy",
            Self::Machine => "machine",
            Self::Run { .. } => "run",
            Self::Switch(_) => "switch",
            Self::DevicePlugin(_) => "device-plugin",
            Self::Logs => "logs",
            Self::Lint => "lint",
            Self::Mutants { .. } => "mutants",
            Self::Fuzz { .. } => "fuzz",
        }
    }
}

pub(crate) fn main() -> ExitCode {
    // Called by dockerd, not by people, hence not in the help.
    let args: Vec<OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|a| a == "oci-runtime") {
        return report(oci_runtime::main(args.get(2..).unwrap_or_default()));
    }
    let args = Args::parse();
    report(as_root().and_then(|()| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .context("starting the runtime")?;
        runtime.block_on(run(args.command))
    }))
}

fn report(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            progress::line(&format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Containers, taps and packages need root: becomes root by sudo, or says so.
fn as_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    progress::line("not root: continuing with sudo");
    let keep = "--preserve-env=PATH,HOME,VF_E2E_CACHE,XDG_CACHE_HOME,CARGO_HOME,\
        CARGO_TARGET_DIR,CARGO_MANIFEST_DIR,RUSTUP_HOME,GOPATH,GOMODCACHE,GOPROXY,GOFLAGS";
    let exe = std::env::current_exe()?;
    let error = Command::new("sudo")
        .arg(keep)
        .arg(exe)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).context("this needs root, and sudo could not be started")
}

async fn run(verb: Verb) -> Result<()> {
    // The process has one provider; nobody installed another before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Daemons of the harness: they keep nothing, and end with their signal.
    match verb {
        Verb::Switch(args) => return machine::switch(args).await,
        Verb::DevicePlugin(args) => return machine::device_plugin(args).await,
        _ => {}
    }
    interrupt::install()?;
    let paths = Paths::discover(verb.name())?;
    exec::set_log_dir(paths.run_logs());
    match verb {
        Verb::Tools => {
            let tools = Ctx::prepare(paths.clone())?.tools;
            println!("KUBEBUILDER_ASSETS={}", tools::assets(&paths).display());
            println!("kubectl is {}", tools.path("kubectl")?.display());
            Ok(())
        }
        Verb::Up => {
            let _one = cache::lock(&paths, "data-centre")?;
            up(paths).await
        }
        Verb::Down => {
            let _one = cache::lock(&paths, "data-centre")?;
            interrupt::begin_teardown();
            context::down(&Ctx::prepare(paths)?)
        }
        Verb::Status => status(paths).await,
        Verb::Demo { keep } => {
            let _one = cache::lock(&paths, "data-centre")?;
            demo::run(paths, keep).await
        }
        Verb::Test { list: true, .. } => {
            for s in scenarios::all() {
                let long = match s.when {
                    scenarios::When::Always => "",
                    scenarios::When::Long => " (long)",
                    scenarios::When::Named => " (by its name only)",
                };
                println!("{:<28} {}{long}", s.name, s.shows);
            }
            Ok(())
        }
        Verb::Test {
            names,
            no_machines,
            long,
            keep,
            ..
        } => {
            let _one = cache::lock(&paths, "data-centre")?;
            let most = if no_machines {
                Needs::Clusters
            } else {
                Needs::BareMachines
            };
            let wish = test::Wish {
                names: &names,
                most,
                long,
                keep,
            };
            test::run(paths, wish).await
        }
        Verb::Deploy => {
            let _one = cache::lock(&paths, "deploy")?;
            let dc = running(paths).await?;
            let images = deploy::build(&dc.ctx.paths)?;
            deploy::up(&dc, &images).await
        }
        Verb::Machine => {
            let _one = cache::lock(&paths, "data-centre")?;
            let dc = running(paths).await?;
            tokio::select! {
                r = machines(&dc) => r,
                stop = interrupt::wait() => Err(stop.into()),
            }
        }
        Verb::Run {
            machine,
            command,
            seconds,
        } => run_in(paths, &machine, &command, seconds).await,
        // Handled above.
        Verb::Switch(_) | Verb::DevicePlugin(_) => Ok(()),
        Verb::Logs => {
            let dc = DataCentre::find(Ctx::prepare(paths)?)
                .await?
                .context("nothing runs")?;
            println!("{}", logs::collect(&dc)?.display());
            Ok(())
        }
        Verb::Lint => {
            let (seen, wrong) = lint::check(&paths)?;
            wrong.iter().for_each(|w| println!("{w}"));
            anyhow::ensure!(
                wrong.is_empty(),
                "{} of {seen} packages are wrong",
                wrong.len()
            );
            println!("{seen} packages: licences, bans and sources are as deny.toml says");
            Ok(())
        }
        Verb::Mutants { names } => {
            let ctx = Ctx::prepare(paths)?;
            let count = mutants::run(&ctx.paths, &names)?;
            runner::summary(count, ctx.paths.run_logs());
            anyhow::ensure!(count.failed == 0, "some breaks went unnoticed");
            Ok(())
        }
        Verb::Fuzz {
            targets,
            minutes,
            keep,
        } => {
            let wish = fuzz::Wish {
                targets: &targets,
                minutes,
                keep,
            };
            let count = fuzz::run(&paths, &wish)?;
            runner::summary(count, paths.run_logs());
            anyhow::ensure!(count.failed == 0, "the fuzzers found something");
            Ok(())
        }
    }
}

async fn running(paths: Paths) -> Result<DataCentre> {
    DataCentre::find(Ctx::prepare(paths)?)
        .await?
        .context("no data centre runs: `cargo e2e up`")
}

/// Runs a command in a machine and ends with its status.
async fn run_in(paths: Paths, name: &str, command: &str, seconds: u64) -> Result<()> {
    let machine = machine::find(&running(paths).await?)?;
    let limit = std::time::Duration::from_secs(seconds);
    let out = if name == machine::NODE {
        machine.l1().run_with(command, &[], limit).await?
    } else {
        machine
            .l2(name)
            .await?
            .run_with(command, &[], limit)
            .await?
    };
    std::io::Write::write_all(&mut std::io::stdout(), &out.stdout)?;
    std::io::Write::write_all(&mut std::io::stderr(), &out.stderr)?;
    anyhow::ensure!(out.success(), "it exited with {}", out.status);
    Ok(())
}

async fn up(paths: Paths) -> Result<()> {
    let ctx = Ctx::prepare(paths)?;
    context::runs(&ctx)?;
    match made(&ctx).await {
        Ok(dc) => {
            print_access(&dc);
            Ok(())
        }
        Err(e) if interrupt::requested() => {
            interrupt::begin_teardown();
            context::down(&ctx)?;
            Err(e)
        }
        Err(e) => Err(e.context("the data centre is not complete; `cargo e2e down` removes it")),
    }
}

async fn machines(dc: &DataCentre) -> Result<()> {
    let l1 = machine::host(dc).await?;
    machine::vm(dc, l1).await?;
    Ok(())
}

/// The data centre, unless it fails or the user interrupts.
async fn made(ctx: &Ctx) -> Result<DataCentre> {
    tokio::select! {
        r = DataCentre::up(ctx.clone()) => r,
        stop = interrupt::wait() => Err(stop.into()),
    }
}

/// As much of the data centre as is needed, unless it fails or the user interrupts.
async fn made_for(ctx: &Ctx, needs: Needs) -> Result<DataCentre> {
    match needs {
        Needs::Machines | Needs::BareMachines => made(ctx).await,
        Needs::Clusters => tokio::select! {
            r = DataCentre::clusters(ctx.clone()) => r,
            stop = interrupt::wait() => Err(stop.into()),
        },
    }
}

async fn status(paths: Paths) -> Result<()> {
    match DataCentre::find(Ctx::prepare(paths)?).await? {
        Some(dc) => print_access(&dc),
        None => println!("no data centre runs"),
    }
    Ok(())
}

fn print_access(dc: &DataCentre) {
    if let Some(host) = dc.docker.host() {
        println!("export DOCKER_HOST={host}");
    }
    for c in [&dc.host, &dc.guest] {
        println!(
            "export KUBECONFIG={}  # {}, {}",
            c.kubeconfig.display(),
            c.node(),
            c.address
        );
    }
}
