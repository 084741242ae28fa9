import sys, io, contextlib, pathlib, tempfile, os
from tests.program.programs import *
from seqmodels.errors import run_main
from seqmodels.tools import generate, tokenize_corpus
tmp = pathlib.Path(tempfile.mkdtemp()); gin = write_config(tmp)
train = load_train_program()
def go(program, *a):
    sys.argv=['p',*map(str,a)]
    o,e=io.StringIO(),io.StringIO(); before=contents(tmp)
    with contextlib.redirect_stdout(o),contextlib.redirect_stderr(e):
        try: run_main(program); code=None
        except SystemExit as x: code=x.code
        except BaseException as x: code=repr(x)[:300]
    config.clear()
    after=contents(tmp)
    print(a[-1] if a else '', '\n   ->',code, e.getvalue().strip()[:1500], '' if before==after else f'CHANGED {set(after)^set(before)}', flush=True)
def t(*over, g=gin): go(train,'--config',g,'--run_dir',tmp/'run',*[f'--gin.{o}' for o in over])
N=[0]
def t(*over, g=gin, run=None):
    N[0]+=1
    go(train,'--config',g,'--run_dir',run or tmp/f'run{N[0]}','--gin.train.steps=2',*[f'--gin.{o}' for o in over])
for o in ["LanguageModel.n_layers=-1","LanguageModel.d_model=0","AdamW.warmup_steps=100","AdamW.weight_decay_rules=[('[',1.0)]",
 "train.transforms=[]","train.transforms=[@mask_inputs]","AdamW.learning_rate=-1.0","AdamW.b1=2.0","train.sample_tokens=-5","GatedLinearAttention.num_heads=0","GatedLinearAttention.form='chunkd'","GatedLinearAttention.backend='pallas'","GatedLinearAttention.backend='pallas_tpu'","GatedLinearAttention.chunk_size=0", "LanguageModel.mlp=@TextData", "AdamW.clip_norm=-1.0", "GatedLinearAttention.expand_k=0.01","train.data=@MQAR()","TextData.column='x'"]:
    t(o)
t("LanguageModel.pattern=('linear_attention',)","LinearAttention.feature_map='elu'","LinearAttention.num_heads=2")
t("LanguageModel.pattern=('softmax_attention',)","SoftmaxAttention.num_heads=3")
t("LanguageModel.pattern=('softmax_attention',)","SoftmaxAttention.num_kv_heads=3","SoftmaxAttention.num_heads=4")
t("LanguageModel.pattern=('softmax_attention',)","SoftmaxAttention.window=0","SoftmaxAttention.num_heads=4")

for text in ["include 'nowhere.gin'","train.steps = %STEPS","train.steps = = 3","train.steps = 3 )","STEPS=4","train.steps == 4","import os","@train","x/train.steps=3","train.data.foo=3","include 'tiny.gin'"]:
    print(text); t(g=write_config(tmp,text))
gin=write_config(tmp)
go(train,'--run_dir',tmp/'q'); go(train,'--config',tmp/'no.gin','--run_dir',tmp/'q'); go(train,'--config',tmp,'--run_dir',tmp/'q'); go(train,'--config',gin,'--run_dir',tmp/'q','--steps','3'); go(train,'--config',gin,'--run_dir','','--gin.train.steps=3'); go(train,'--config',gin,'--run_dir',tmp/'q','--gin.train.steps'); go(train,'--config',gin)
for d in ['/proc/run','/sys/run','/proc/self/x/y',gin,gin/'x',tmp/'texts','/dev/null/x', tmp]: t(run=d)
(tmp/'empty').mkdir(); t(f"TextData.paths='{tmp}/empty'")
(tmp/'empty/a.txt').write_text(''); t(f"TextData.paths='{tmp}/empty'")
(tmp/'empty/a.txt').write_bytes(b'a\0b'); t(f"TextData.paths='{tmp}/empty'")
(tmp/'empty/a.txt').write_text('a'); t(f"TextData.paths='{tmp}/empty'")
(tmp/'empty/a.txt').write_text('ab'); t(f"TextData.paths='{tmp}/empty'")
(tmp/'empty/a.txt').write_text('{'); t(f"TextData.tokenizer='{tmp}/empty/a.txt'")
(tmp/'empty/a.json').write_text('{"version": "1.0"}'); t(f"TextData.tokenizer='{tmp}/empty/a.json'")
(tmp/'b.txt.gz').write_text('ab'); t(f"TextData.paths='{tmp}/b.txt.gz'")
t(f"TextData.paths='{tmp}/*.nothing'"); t("TextData.paths=[]"); t("TextData.paths=''")
