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
for o in ["LanguageModle.d_model=3","LanguageModel.d_modle=3","SGD.momentum=0.1","train.steps='ten'","train.steps=1.5","AdamW.learning_rate='fast'","train.model=3",
 "LanguageModel.dtype=%bfloat","train.steps=","train.steps=[1","TextData.paths='nowhere.txt'","TextData.tokenizer='gpt2'","TextData.packing='packd'","TextData.held_out_fraction=2.0",
 "train.accumulate=3","LanguageModel.d_model=15","LanguageModel.pattern=('gated_linear_attention','retention')","LanguageModel.pattern=('gated_linear_atention',)","LanguageModel.pattern=()",
 "LanguageModel.remat='dot'","LanguageModel.norm='rmsnrom'","AdamW.schedule='cosin'","train.seq_len=0","train.seed=-1","train.batch_size=0","LanguageModel.vocab_size=100","LanguageModel.n_layers=0","LanguageModel.d_model=0","AdamW.warmup_steps=100","AdamW.weight_decay_rules=[('[',1.0)]","train.profile_steps=(5,2)",
 "train.transforms=[]","train.transforms=[@mask_inputs]","AdamW.learning_rate=-1.0","AdamW.b1=2.0","train.sample_tokens=-5","train.sample_tokens=5","GatedLinearAttention.num_heads=0","GatedLinearAttention.form='chunkd'","GatedLinearAttention.backend='pallas'","GatedLinearAttention.chunk_size=0", "LanguageModel.mlp=@TextData","train.keep=0", "AdamW.clip_norm=-1.0", "GatedLinearAttention.expand_k=0.01"]:
    t(o)
t("LanguageModel.pattern=('linear_attention',)","LinearAttention.feature_map='elu'","LinearAttention.num_heads=2")
t("LanguageModel.pattern=('softmax_attention',)","SoftmaxAttention.num_heads=3")
t("LanguageModel.pattern=('softmax_attention',)","SoftmaxAttention.num_kv_heads=3","SoftmaxAttention.num_heads=4")
t("LanguageModel.pattern=('softmax_attention',)","SoftmaxAttention.window=0","SoftmaxAttention.num_heads=4")
